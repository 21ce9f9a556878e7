"""Methods of feature augmentation, a module for each."""

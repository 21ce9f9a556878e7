"""Linear evaluation: how well linear classifiers and nearest neighbours do on frozen features."""

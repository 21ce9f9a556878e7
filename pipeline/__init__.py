"""The pipeline: runs stages as processes and reads only the files that they leave."""

"""What can be trained: one folder or file for each task, and where their data comes from."""

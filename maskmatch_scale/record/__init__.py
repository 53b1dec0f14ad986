"""What a run leaves behind: metrics, progress, the report. Reads files, knows no model and no data set."""

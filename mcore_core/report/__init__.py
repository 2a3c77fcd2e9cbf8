"""What a run tells: console, metrics.jsonl, TensorBoard, report.html."""

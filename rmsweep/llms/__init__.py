"""Base LLMs: what samples a bank's responses. A config here names one; how it is run is its dataset's business."""

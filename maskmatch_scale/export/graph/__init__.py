"""ONNX: the graph of an exported segmenter for images of one size, checked against torch before it is kept."""

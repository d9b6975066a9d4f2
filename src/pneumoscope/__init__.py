"""pneumoscope: from a folder of chest X-rays to trained, measured and explained pneumonia classifiers."""

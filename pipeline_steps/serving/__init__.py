"""What travels with a model into MLflow, as a package under another name: hence the relative imports.

Nothing here may import more than what these name.
"""

CLASSIFIER_REQUIRES = ("numpy", "onnxruntime", "pillow", "torch", "torchvision")
REQUIRES = (*CLASSIFIER_REQUIRES, "mlflow", "pandas")  # with `pyfunc`, as MLflow serves the classifier
TRAINED_ON = "trained_on.txt"  # in a package: sample ids, so that no model is ever judged on what it was trained on

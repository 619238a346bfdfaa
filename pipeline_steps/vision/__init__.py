"""The engine: decoding, networks, training. Imports only torch, torchvision, timm, numpy, scikit-learn, Pillow."""

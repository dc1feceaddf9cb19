"""Every private name of TensorFlow and Keras, every patch, and every match on the text of an error.

`tests/backend/` fails when one of them changes its meaning.
"""

"""The web page of a trained model, and its handlers."""

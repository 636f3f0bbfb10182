"""Measuring a model on held-out items: replies, accuracies with intervals, and the page that shows them."""

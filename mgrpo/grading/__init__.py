"""Answers: taken out of responses, brought to one form, and compared."""

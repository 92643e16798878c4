"""Extracts answers from responses and labels, brings them to one form and compares them."""

from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.labels import make_label_reader

__all__ = ["AnswerChecker", "canonicalize", "make_extractor", "make_label_reader"]

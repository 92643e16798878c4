"""Answers, for other programs: read out of a response, brought to one form, compared."""

from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor

__all__ = ["AnswerChecker", "canonicalize", "make_extractor"]

"""Reads data record by record, renders and encodes prompts, and draws them in a reproducible order."""

from mgrpo.data.prompts import Dataset, Prompt, make_dataset
from mgrpo.data.records import Record, load_records, read_records
from mgrpo.data.sampler import Sampler

__all__ = ["Dataset", "Prompt", "Record", "Sampler", "load_records", "make_dataset", "read_records"]

"""Shared by all tests: quiet transformers, a fixed number of threads."""

import torch
import transformers

torch.set_num_threads(2)
transformers.utils.logging.disable_progress_bar()

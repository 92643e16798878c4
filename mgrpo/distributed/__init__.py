"""The processes of a run. So far there is one: a world of more is refused at the start."""

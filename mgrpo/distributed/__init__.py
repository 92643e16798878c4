"""The processes of a run. A world of several processes is refused at the start."""

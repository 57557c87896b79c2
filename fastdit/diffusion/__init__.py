"""Noising paths, objectives, guidance and samplers; t = 0 is data, t = 1 is noise."""

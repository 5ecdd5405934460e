"""The parts of calibration that need no runtime; `halfbyte.converter.calibrate` puts them together."""

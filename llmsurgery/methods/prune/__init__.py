"""Methods that make a model sparser or smaller."""

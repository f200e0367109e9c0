"""What the doctor's facts mean: values in, findings out."""

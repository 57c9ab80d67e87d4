"""What is believed of problems whose rows were not measured anew."""

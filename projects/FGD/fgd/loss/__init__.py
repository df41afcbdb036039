"""The FGD terms: masks, attention, the definition, and the same in less memory and time."""

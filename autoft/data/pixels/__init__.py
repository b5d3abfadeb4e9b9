"""Files into pixels: one decoder, one pass, one store that all share."""

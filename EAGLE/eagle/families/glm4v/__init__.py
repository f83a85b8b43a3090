"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR."""

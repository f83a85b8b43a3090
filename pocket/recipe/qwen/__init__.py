"""The pocket Qwen2-VL: tokenizer, sizes, prompt, training, export. Pictures and questions are those of pocket."""

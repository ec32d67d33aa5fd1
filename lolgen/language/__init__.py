"""The language side: the small language model, the speeches that its adapters learn, and how both are judged."""

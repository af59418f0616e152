"""From a request to an OpenAI-shaped answer."""

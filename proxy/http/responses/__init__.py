"""OpenAI's Responses API, without state: its request bodies, its answers and streams of events. Knows no engine."""

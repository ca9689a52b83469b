"""OpenAI's API over HTTP: routes, request bodies, answers, errors."""

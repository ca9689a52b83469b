"""A load generator for any server that speaks OpenAI's API: what is sent when, what came back when, what it amounts to.

Stands beside the servers, never below them: of Baton it imports `node` only, and knows a server by its URL.
"""

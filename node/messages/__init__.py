"""Every message on the wire: frozen structs, one tag each, MessagePack, bounds checked on decoding."""

"""What ties kdfast to other libraries; nothing here is imported by ``import kdfast``."""

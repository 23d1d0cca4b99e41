"""What a layer gives: named reductions, and the hooks that read them."""

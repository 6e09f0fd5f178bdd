"""What Tidegate is measured beside. Each runs as a process of its own, and is written as the
documentation of its makers writes such a service. All but `bare` call the stack's Triton."""

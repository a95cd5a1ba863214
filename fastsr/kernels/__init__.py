"""One folder per operator: the public function, its reference and its kernels' launchers."""

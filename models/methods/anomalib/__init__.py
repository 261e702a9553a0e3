"""Any image model of the library anomalib; only what runs such a model imports the library."""

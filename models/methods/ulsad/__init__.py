"""ULSAD and the deep feature reconstruction that it revisits: networks, losses, the detector."""

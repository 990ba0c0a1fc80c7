"""The routed family: linears and convolutions on a part of their channels, chosen by task or by sample."""

"""The demonstration behind `python -m fused_resblock demo`: handwritten digits and photographs, eager and fused."""

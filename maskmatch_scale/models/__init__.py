"""Segmenters: timm ViTs and transformers SegFormers whose masked units are never computed."""

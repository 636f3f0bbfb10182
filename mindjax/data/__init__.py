"""From messages, images and videos to arrays: decoding, resizing, rendering, packing, tasks."""

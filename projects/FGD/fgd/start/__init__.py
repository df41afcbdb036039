"""From a COCO JSON to configs of teacher, student and distilled student."""

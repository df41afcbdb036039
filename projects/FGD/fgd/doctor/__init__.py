"""The doctor: is the teacher what it should be, and does it reach the student, before step one."""

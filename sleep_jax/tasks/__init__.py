"""What life brings: streams of experience, and exams over them."""

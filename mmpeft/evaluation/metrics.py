def exact_match(a, b): return a.strip() == b.strip()

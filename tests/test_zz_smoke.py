def test_run(tiny_run):
    import os
    print(os.listdir(tiny_run))
    import mmpeft
    v = mmpeft.load(str(tiny_run))
    print(v.adapters, v.ask(None, "hi", max_new_tokens=3))

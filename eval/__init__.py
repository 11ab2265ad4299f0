"""Did the model get better, and how sure is that?"""

"""WHERE THEY MEET: a plan of tools, the referee that admits what they propose, and the one loop
that runs them.
"""

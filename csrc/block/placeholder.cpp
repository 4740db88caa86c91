namespace kvc2 {}

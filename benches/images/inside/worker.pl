# A service with an index of texts: the same trade as worker.py, in another allocator's memory.
use strict;
use warnings;
use File::Find;
use Data::Dumper;
use Encode;
use POSIX;
use Storable qw(dclone);

my ($total, %index) = (0);
my @files;
find({ no_chdir => 1, wanted => sub { push @files, $_ if /\.p[ml]$/ && -f } }, '/usr/share/perl');
for my $name (sort @files) {
    open(my $file, '<', $name) or next;
    while (my $line = <$file>) {
        push @{ $index{$_} }, $. for $line =~ /(\w+)/g;
        $total += length $line;
    }
    last if $total > 1 << 20;
}
my $copy = dclone(\%index);
open(my $ready, '>', $ARGV[0]) or die;
close($ready);
sleep 1_000_000;
